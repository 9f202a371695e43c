"""What a merge would meet, from one pass over the base and the experts: see `result.Diagnosis`."""
