"""The quality lab: do merges keep the experts' skills, on real weights and real data?"""
