"""Parts that differ between text-to-image, vision-language and the step judge."""
