"""Pages that show what alignment changed, one entry beside the other, the losses as easy to find as the gains."""
