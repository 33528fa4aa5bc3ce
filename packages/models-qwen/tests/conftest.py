import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
# A silent promotion to float32 is a defect.
jax.config.update("jax_numpy_dtype_promotion", "strict")
