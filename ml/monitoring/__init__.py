"""What the served model sees and how it fares: the prediction log, drift against the reference, verdicts and alerts."""
