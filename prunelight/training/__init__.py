"""The Lightning side: module, data, Trainer and what makes a resume exact."""
