"""What measures: studies, comparison, benchmarks, sharpness and the cost at scale. Only the program imports it."""
