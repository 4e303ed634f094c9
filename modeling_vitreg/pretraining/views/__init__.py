"""What an objective sees of an image: crops, masks, batches of them."""
