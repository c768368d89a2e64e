// random: a hash of position, layer and head, even in [0, 1). The baseline of every other metric; the same on every run.
#include "tca-importance.h"

void tca_metric_random(const tca_metric_input & in, double * importance) {
    for (int t = 0; t < in.n_tokens; ++t) {
        // splitmix64 (Steele et al. 2014) of the three numbers side by side
        uint64_t x = ((uint64_t) (uint32_t) in.positions[t] << 32) | ((uint64_t) (uint16_t) in.layer << 16) | (uint16_t) in.head;
        x += 0x9e3779b97f4a7c15u;
        x  = (x ^ (x >> 30))*0xbf58476d1ce4e5b9u;
        x  = (x ^ (x >> 27))*0x94d049bb133111ebu;
        importance[t] = ((x ^ (x >> 31)) >> 11)*0x1p-53;
    }
}
