"""What judges: how a submission is called and confined, and how its answers are compared."""
