"""HTTP: a request becomes a command, a question is asked of the read models; no rules in here."""
