"""What a report is made of: the material, its tables and its figures, as a page and as Markdown."""
