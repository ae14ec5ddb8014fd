"""What makes a step lean: attention, the head and its loss, and what is put into a model's layers while it trains."""
