"""Training photos: bundled, uploaded, from folders, zip files and Hub datasets."""
