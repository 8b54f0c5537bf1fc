"""Writing shards from folders, tables and archives of images, and verifying them."""
