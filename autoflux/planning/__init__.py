"""How to run it: pure functions from hardware, model, profile and wishes to a plan. No torch, files or clock."""
