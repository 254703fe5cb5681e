"""One file per measure: what it measures, of which images and prompts, with which interval."""
