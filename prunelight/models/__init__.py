"""Loading, running, placing and saving models."""

from prunelight.moved import serve_old_names

serve_old_names(__name__)
