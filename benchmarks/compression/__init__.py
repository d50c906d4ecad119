"""Cost and savings of low rank: factors in l_2 and l_p, compression, expansion before it."""
