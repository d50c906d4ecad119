"""What low rank costs and saves: factors in l_2 and l_p, compression, expansion before it."""
