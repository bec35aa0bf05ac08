"""Many runs: a sweep file becomes cells, and each cell a record."""
