"""The one door out: every HTTP request to an address that a user chose."""
