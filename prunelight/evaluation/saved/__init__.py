"""One model by its name, alone or beside its reference: measured part by part, kept in a file."""
