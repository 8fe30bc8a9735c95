"""Generated behaviour logs in published layouts, with the truth planted in them."""
