"""What to try next: search space, study, ask and tell, and the ledger of trials."""
