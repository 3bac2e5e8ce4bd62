"""MM-Rec: recurrent language models for CPUs."""
