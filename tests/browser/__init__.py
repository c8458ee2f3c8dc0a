"""What people see, in the programs they use (a package, so that there may be two conftest)."""
