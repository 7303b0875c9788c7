"""Image sets, a file each, and their augmentation."""
