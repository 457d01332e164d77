"""The data set: metadata tables, images, sizes, and the order in which samples are seen."""
