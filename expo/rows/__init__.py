"""Everything that is made row by row: what a row job is, its files, parts and joining, and the workers."""
