"""`python -m data_prep` in a clone of the repository; the code is in `tim4rec_jax.data_prep`."""
