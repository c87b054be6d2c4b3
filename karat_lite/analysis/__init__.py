"""Looking at models: every function here returns plain numbers, arrays or records; plots.py draws them."""
