"""Why a network gives an image its class: filters, feature maps, Grad-CAM, in one picture."""
