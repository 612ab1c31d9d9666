"""Benchmarks of everystep and its peers: blocking time, durability, overhead per leaf, cost to training."""
