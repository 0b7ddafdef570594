"""What tests and benchmarks share: cases, error budgets, guards. Imported by nothing else in the package."""
