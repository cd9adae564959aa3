"""Knowledge: passages and a user's own corpus in one folder, asked by a note's segments."""
