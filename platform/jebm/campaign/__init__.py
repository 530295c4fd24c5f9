"""Many runs for one question: arms with seeds, trained, measured, and resumed where they were stopped."""
