"""Tables and figures, drawn from plans and records; no torch here."""
