"""Where a weight file comes from, in what it differs from another, and how it is made again."""
