"""Merges overnight: many recipes in one process, resumable as a whole, evaluated, and only the best kept."""

from streammerge.batching.forecast import Outline, outline
from streammerge.batching.night import Job, Keep, Night, read_night
from streammerge.batching.run import Outcome, run_night
from streammerge.batching.together import Group, Planner

__all__ = ["Group", "Job", "Keep", "Night", "Outcome", "Outline", "Planner", "outline", "read_night", "run_night"]
