"""Many runs for one question: arms and seeds, trained, measured, and resumed after a stop."""
