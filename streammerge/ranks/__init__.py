"""One merge by several processes, on one host or on several that share a folder: `run.merge_as_one_of`."""
