"""The three official evaluations of the paper over expo's answers, and the paper's tables from its released files."""
