"""What a run is: its folder, its command line, its comparison with others, its training."""
