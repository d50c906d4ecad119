"""What training an expanded network costs, and what it gives."""
