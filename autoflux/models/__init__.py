"""What is to run: models, their parts, and requests to them."""
