"""The browser app: a view of run folders. It loads no model and trains nothing itself."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported: nothing leaves this computer
