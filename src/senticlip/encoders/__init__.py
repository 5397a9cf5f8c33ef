"""From tokens and pixels to features."""
