"""Pages that say what a merge did, or what one would meet: one HTML file each, without script or network."""
