"""What the sessions of the noxfile decide: members of the workspace, their tags, wheels, releases and public names.

`members` reads pyproject.toml files and git tags, and checks the bounds between members; `wheels` builds wheels of this
tree and of tags; `releases` makes the commit and the tag of a release; `public_names` compares the public names with
the last release; `compatibility` writes the table in COMPATIBILITY.md.
"""
