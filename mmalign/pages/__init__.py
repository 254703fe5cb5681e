"""HTML and PNG galleries of samples before and after alignment, with gains and regressions shown alike."""
