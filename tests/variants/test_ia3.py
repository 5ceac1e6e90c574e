SMALL = {"target_modules": [r"(.*\.)?(fc\d|key|value|output\.dense|c_attn|c_proj)"]}
CHANGES = {"feedforward_modules": ([["fc1"]], {})}
