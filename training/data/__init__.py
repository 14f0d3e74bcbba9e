"""Training photos: bundled, uploaded, and from folders, zip files and Hub datasets."""
