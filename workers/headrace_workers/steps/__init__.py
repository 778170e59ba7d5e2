"""What happens to a job in its run: one step a file, in the order of the lists in `parts`."""
